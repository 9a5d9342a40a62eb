-- What the guard saw, added to what all gateways have seen: each member counts once.
-- KEYS: set of members, hash of counts. ARGV: most members, most merchants, seconds to live of each key, then for each sighting its member,
-- what it is (thing:how), how, and the merchant or an empty text. Returns the hash, flat.
local cards, counts = KEYS[1], KEYS[2]
local room = tonumber(ARGV[1]) - redis.call('SCARD', cards)
local merchants = tonumber(ARGV[2]) - tonumber(redis.call('HGET', counts, 'merchants') or 0)
for i = 5, #ARGV, 4 do
  if room > 0 and redis.call('SADD', cards, ARGV[i]) == 1 then
    room = room - 1
    redis.call('HINCRBY', counts, ARGV[i + 1], 1)
    local merchant = ARGV[i + 3]
    if merchant ~= '' then
      local known = redis.call('HEXISTS', counts, 'm:0:' .. merchant) + redis.call('HEXISTS', counts, 'm:1:' .. merchant)
        + redis.call('HEXISTS', counts, 'm:2:' .. merchant)
      if known == 0 and merchants > 0 then
        merchants, known = merchants - 1, 1
        redis.call('HINCRBY', counts, 'merchants', 1)
      end
      if known > 0 then
        redis.call('HINCRBY', counts, 'm:' .. ARGV[i + 2] .. ':' .. merchant, 1)
      end
    end
  end
end
redis.call('EXPIRE', cards, ARGV[3])
redis.call('EXPIRE', counts, ARGV[4])
return redis.call('HGETALL', counts)
