-- One atomic step of the Spark job for one entity: replace its frauds by hour. Fenced by epoch and batch: a replayed batch changes nothing.
--
-- KEYS  labels
-- ARGV  1 labels value, 2 ttl ms
-- Reply 1 when written, 0 when this batch or a later one had been written before.
local function fence(value)
  return struct.unpack('<i8I4', string.sub(value, 9, 20))
end
local now = redis.call('GETRANGE', KEYS[1], 0, 19)
if #now == 20 and string.sub(now, 1, 8) == string.sub(ARGV[1], 1, 8) then
  local batch, epoch = fence(ARGV[1])
  local last_batch, last_epoch = fence(now)
  if last_epoch == epoch and last_batch >= batch then return 0 end
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
