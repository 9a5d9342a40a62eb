-- One atomic step of the rebuild for one entity: write its tiles, its head and its early list, if its head is still the one read.
-- Fenced by epoch and batch: older than what stands there is refused. The same batch is written again, since it comes out the same.
--
-- KEYS  head, tiles, early
-- ARGV  1 tiles value, with the number of early hashes in its header, 2 the head that was read (empty: there was none), 3 head value
--       (empty: leave it as it is), with that number behind its header, if any, 4 early hashes (8 bytes each), 5 tiles ttl ms, 6 head ttl ms, 7 early ttl ms
-- Reply 1 when written, 0 when refused, -1 when the head has changed: read it again.
local function fence(value)
  return struct.unpack('<i8I4', string.sub(value, 9, 20))
end
local batch, epoch = fence(ARGV[1])
local now = redis.call('GETRANGE', KEYS[2], 0, 19)
if #now == 20 then
  local last_batch, last_epoch = fence(now)
  if last_epoch == epoch and last_batch > batch then return 0 end
end
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[2] then return -1 end
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[5])
if ARGV[3] ~= '' then redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[6]) end
if ARGV[4] == '' then redis.call('DEL', KEYS[3]) else redis.call('SET', KEYS[3], ARGV[4], 'PX', ARGV[7]) end
return 1
