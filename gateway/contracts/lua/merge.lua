-- One atomic step of the Spark job for one entity: replace its tiles and mark their events as tiled in its head.
-- Fenced by epoch and batch: a replayed batch changes nothing.
--
-- KEYS  head, tiles, early
-- ARGV  1 tiles value, 2 hashes of this batch's transactions that a gateway observes from Kafka (8 bytes each, oldest first),
--       3 hashes of its others (observed before they were published, or never), 4 how many transactions the batch added in all,
--       5 tiles ttl ms, 6 compact heads above this many events, 7 events kept before the retention,
--       8 keep what was observed within this many seconds before the newest, 9 head retention ms, 10 early ttl ms,
--       11 most early hashes
-- Reply 1 when written, 0 when this batch had been written before.
--
-- A transaction of argument 2 that isn't in the head was evicted from it, or the gateway has not come to it yet (it was down, or
-- lags). Its hash goes to the early list, so that entity.lua marks it as tiled when it comes: else it would count twice. Bytes 21 to
-- 24 of the tiles header say how many hashes the list has, so that a reader need not look for a list that isn't there.
local function fence(value)
  return struct.unpack('<i8I4', string.sub(value, 9, 20))
end
local batch, epoch = fence(ARGV[1])
local now = redis.call('GETRANGE', KEYS[2], 0, 23)
local old_early = 0
if #now == 24 then
  local last_batch, last_epoch = fence(now)
  if last_epoch == epoch and last_batch >= batch then return 0 end
  old_early = struct.unpack('<I4', string.sub(now, 21, 24))
end

local head = redis.call('GET', KEYS[1]) or ''
local events = 0
if #head >= 24 and (#head - 24) % 44 == 0 then events = (#head - 24) / 44 end
local place = {}
for i = 0, events - 1 do place[string.sub(head, 25 + 44 * i, 32 + 44 * i)] = i end
local tiled, found = {}, 0
local function mark(hashes)
  local unfound = {}
  for i = 1, #hashes, 8 do
    local txn = string.sub(hashes, i, i + 7)
    local at = place[txn]
    if at then
      tiled[at] = true
      found = found + 1
    else
      unfound[#unfound + 1] = txn
    end
  end
  return unfound
end
local unfound = mark(ARGV[2])
mark(ARGV[3])

local early = ''
if old_early > 0 then
  -- What the gateway has come to since is in its head, and no longer early.
  local hashes, still = redis.call('GET', KEYS[3]) or '', {}
  for i = 1, #hashes, 8 do
    local txn = string.sub(hashes, i, i + 7)
    if not place[txn] then still[#still + 1] = txn end
  end
  early = table.concat(still)
end
local seq, lost = 0, 0
if events > 0 then seq, lost = struct.unpack('<I4I4', string.sub(head, 17, 24)) end
-- The head has evicted some before they were tiled, and the oldest are taken to be those: the gateway won't come to them again.
for _ = 1, math.min(lost, #unfound) do table.remove(unfound, 1) end
if #unfound > 0 or old_early > 0 then
  early = string.sub(early .. table.concat(unfound), -8 * tonumber(ARGV[11]))
  if early == '' then redis.call('DEL', KEYS[3]) else redis.call('SET', KEYS[3], early, 'PX', ARGV[10]) end
end
redis.call('SET', KEYS[2], string.sub(ARGV[1], 1, 20) .. struct.pack('<I4', #early / 8) .. string.sub(ARGV[1], 25), 'PX', ARGV[5])
if events == 0 then return 1 end

-- What this batch added and the head no longer holds was evicted before it was tiled: now it is in the tiles after all.
local less = math.max(0, lost - (tonumber(ARGV[4]) - found))
local kept = {}
if events > tonumber(ARGV[6]) then
  -- Keep what a reader may still need: untiled, lately observed, within the retention behind the newest, or among the few before.
  local times = {}
  for i = 0, events - 1 do times[i + 1] = struct.unpack('<i8', string.sub(head, 25 + 44 * i + 8, 25 + 44 * i + 15)) end
  local sorted = {unpack(times)}
  table.sort(sorted)
  -- The newest few of those before the retention: an event out of order within it still finds the one before it.
  local keep_from, older = sorted[events] - tonumber(ARGV[9]), 0
  while older < events and sorted[older + 1] < keep_from do older = older + 1 end
  if older > 0 then keep_from = sorted[math.max(1, older - tonumber(ARGV[7]) + 1)] end
  local newest_s = struct.unpack('<I2', string.sub(head, 25 + 44 * (events - 1) + 24, 25 + 44 * (events - 1) + 25))
  for i = 0, events - 1 do
    local is_tiled = tiled[i] or string.byte(head, 25 + 44 * i + 26) == 1
    local observed_s = struct.unpack('<I2', string.sub(head, 25 + 44 * i + 24, 25 + 44 * i + 25))
    if not is_tiled or (newest_s - observed_s) % 65536 <= tonumber(ARGV[8]) or times[i + 1] >= keep_from then
      local record = string.sub(head, 25 + 44 * i, 68 + 44 * i)
      if is_tiled then record = string.sub(record, 1, 26) .. '\1' .. string.sub(record, 28) end
      kept[#kept + 1] = record
    end
  end
  if #kept < events then
    redis.call('SET', KEYS[1], string.sub(head, 1, 16) .. struct.pack('<I4I4', seq, less) .. table.concat(kept), 'KEEPTTL')
    return 1
  end
end
for i in pairs(tiled) do redis.call('SETRANGE', KEYS[1], 24 + 44 * i + 26, '\1') end
if less ~= lost then redis.call('SETRANGE', KEYS[1], 20, struct.pack('<I4', less)) end
return 1
