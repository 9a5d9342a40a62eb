-- Store answers whose claim may be another's too by now: the first one stands.
-- KEYS  idempotency keys
-- ARGV  1 idempotency ttl ms, then for each key its record, claim and answer
-- Reply what stood there with an answer (or false: stored).
local found = {}
for i = 1, #KEYS do
  local held = redis.call('GET', KEYS[i])
  if held and #held > 32 then
    found[i] = held
  else
    redis.call('SET', KEYS[i], ARGV[i + 1], 'PX', ARGV[1])
    found[i] = false
  end
end
return found
