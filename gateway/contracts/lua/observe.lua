-- One atomic step of the gateway for a batch: claim idempotency records, append each transaction to its entities' heads,
-- and return what stood there before, with the tiles.
--
-- KEYS  progress, then for each transaction: its idempotency key, then head and tiles key of each of its entities (the keys of the
--       early list and of the frauds, which differ from the tiles key in the last letter, lie in the same hash slot and are derived)
-- ARGV  1 update (1 or 0: read only), 2 idempotency ttl ms, 3 head ttl ms,
--       4 most early hashes, then for each transaction: claim (fingerprint and position, 32 bytes), number of entities,
--       then for each entity: capacity, head header for a new head (24 bytes), packed event (44 bytes)
-- Reply progress, then for each transaction: its idempotency record before (or false), then, unless the record settles it
--       (another fingerprint, another position, or an answer to the HTTP door), for each entity: head, tiles, frauds, own place.
--       A redelivery from the same position of Kafka is decided again, since its first decision was never committed.
local update = ARGV[1] == '1'
local reply = {redis.call('GET', KEYS[1])}
local early_max = tonumber(ARGV[4])
local k, a, n = 2, 5, 1
while a <= #ARGV do
  local claim, entities = ARGV[a], tonumber(ARGV[a + 1])
  a = a + 2
  local before = false
  if update then
    if not redis.call('SET', KEYS[k], claim, 'NX', 'PX', ARGV[2]) then before = redis.call('GET', KEYS[k]) end
  end
  k = k + 1
  n = n + 1
  reply[n] = before
  if before and (string.sub(before, 1, 32) ~= claim or (#before > 32 and string.sub(claim, 17, 17) == 'h')) then
    k = k + 2 * entities
    a = a + 3 * entities
  else
    for _ = 1, entities do
      reply[n + 1], reply[n + 2], reply[n + 3], reply[n + 4] =
        observe_entity(KEYS[k], KEYS[k + 1], tonumber(ARGV[a]), ARGV[a + 1], ARGV[a + 2], update, ARGV[3], early_max)
      n = n + 4
      k = k + 2
      a = a + 3
    end
  end
end
return reply
