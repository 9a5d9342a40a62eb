-- One atomic step of the Spark job for one entity: replace its tiles and mark their events as tiled in its head.
-- Fenced by epoch and batch: a replayed batch changes nothing.
--
-- KEYS  head, tiles
-- ARGV  1 tiles value, 2 transaction hashes that this batch added (8 bytes each), 3 tiles ttl ms,
--       4 compact heads above this many events, 5 events always kept, 6 keep if observed at or after (seconds),
--       7 head retention ms
-- Reply 1 when written, 0 when this batch had been written before.
local function fence(value)
  return struct.unpack('<i8I4', string.sub(value, 9, 20))
end
local batch, epoch = fence(ARGV[1])
local now = redis.call('GETRANGE', KEYS[2], 0, 23)
if #now == 24 then
  local last_batch, last_epoch = fence(now)
  if last_epoch == epoch and last_batch >= batch then return 0 end
end
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[3])

local head = redis.call('GET', KEYS[1])
if not head or #head < 16 then return 1 end
local unfound = 0
local tiled = {}
for i = 1, #ARGV[2], 8 do
  local txn = string.sub(ARGV[2], i, i + 7)
  local at, found = 17, false
  while true do
    at = string.find(head, txn, at, true)
    if not at then break end
    if (at - 17) % 48 == 0 then
      redis.call('SETRANGE', KEYS[1], at + 43, '\1')
      tiled[(at - 17) / 48] = true
      found = true
      break
    end
    at = at + 1
  end
  if not found then unfound = unfound + 1 end
end
local seq, lost = struct.unpack('<I4I4', string.sub(head, 9, 16))
local less = math.max(0, lost - unfound)
local events = (#head - 16) / 48
if events > tonumber(ARGV[4]) then
  -- Keep what a reader may still need: untiled, lately observed, within the retention behind the newest, or among the newest few.
  local times = {}
  for i = 0, events - 1 do times[i + 1] = struct.unpack('<i8', string.sub(head, 17 + 48 * i + 8, 17 + 48 * i + 15)) end
  local sorted = {unpack(times)}
  table.sort(sorted)
  local keep_from = math.min(sorted[math.max(1, events - tonumber(ARGV[5]) + 1)], sorted[events] - tonumber(ARGV[7]))
  local kept = {}
  for i = 0, events - 1 do
    local is_tiled = tiled[i] or string.byte(head, 17 + 48 * i + 44) == 1
    local observed = struct.unpack('<I4', string.sub(head, 17 + 48 * i + 24, 17 + 48 * i + 27))
    if not is_tiled or observed >= tonumber(ARGV[6]) or times[i + 1] >= keep_from then
      local record = string.sub(head, 17 + 48 * i, 64 + 48 * i)
      if is_tiled then record = string.sub(record, 1, 44) .. '\1' .. string.sub(record, 46) end
      kept[#kept + 1] = record
    end
  end
  if #kept < events then
    redis.call('SET', KEYS[1], string.sub(head, 1, 8) .. struct.pack('<I4I4', seq, less) .. table.concat(kept), 'KEEPTTL')
    return 1
  end
end
if less ~= lost then redis.call('SETRANGE', KEYS[1], 12, struct.pack('<I4', less)) end
return 1
