-- One atomic step of the Spark job for one entity: replace its tiles and mark their events as tiled in its head.
-- Fenced by epoch and batch: a replayed batch changes nothing.
--
-- KEYS  head, tiles, early
-- ARGV  1 tiles value, 2 hashes of this batch's transactions that a gateway observes from Kafka (8 bytes each, oldest first),
--       3 hashes of its others (observed before they were published, or never), 4 how many transactions the batch added in all,
--       5 tiles ttl ms, 6 compact heads above this many events, 7 events kept before the retention,
--       8 keep what was observed within this many seconds before the newest, 9 head retention ms, 10 early ttl ms,
--       11 most early hashes, 12 head ttl ms
-- Reply 1 when written, 0 when this batch had been written before.
--
-- A transaction of argument 2 that isn't in the head was evicted from it, or the gateway has not come to it yet (it was down, or
-- lags). Its hash goes to the early list, so that entity.lua marks it as tiled when it comes: else it would count twice. Bytes 21 to
-- 24 of the tiles header say how many hashes the list has, and so do 4 more bytes behind the header of the head, while there are any: so
-- nobody need look for a list that isn't there.
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
local events, start = 0, 25
if #head >= 68 and (#head - 24) % 44 == 4 then start = 29 end
if #head >= 68 and (#head - start + 1) % 44 == 0 then events = (#head - start + 1) / 44 end
local place = {}
for i = 0, events - 1 do place[string.sub(head, start + 44 * i, start + 7 + 44 * i)] = i end
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
local lost = 0
if events > 0 then lost = struct.unpack('<I4', string.sub(head, 21, 24)) end
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
local drop, drops = {}, 0
if events > tonumber(ARGV[6]) then
  -- Keep what a reader may still need: untiled, lately observed, within the retention behind the newest, or among the few before.
  local times = {}
  for i = 0, events - 1 do times[i + 1] = struct.unpack('<i8', head, start + 44 * i + 8) end
  local sorted = {unpack(times)}
  table.sort(sorted)
  -- The newest few of those before the retention: an event out of order within it still finds the one before it.
  local keep_from, older = sorted[events] - tonumber(ARGV[9]), 0
  while older < events and sorted[older + 1] < keep_from do older = older + 1 end
  if older > 0 then keep_from = sorted[math.max(1, older - tonumber(ARGV[7]) + 1)] end
  -- The last one is always kept, so the next one's place is known.
  local newest_s = struct.unpack('<I2', head, start + 44 * (events - 1) + 24)
  for i = 0, events - 1 do
    local is_tiled = tiled[i] or string.byte(head, start + 44 * i + 26) == 1
    local observed_s = struct.unpack('<I2', head, start + 44 * i + 24)
    if is_tiled and (newest_s - observed_s) % 65536 > tonumber(ARGV[8]) and times[i + 1] < keep_from then
      drop[i] = true
      drops = drops + 1
    end
  end
end
local mark = early ~= '' and struct.pack('<I4', #early / 8) or ''
if drops > 0 or start ~= 25 + #mark or #head < 2048 then
  -- Written whole, in no more memory than it needs: what the gateway appends takes twice as much.
  local parts, from, seq = {string.sub(head, 1, 20), struct.pack('<I4', less), mark}, start, 0
  local function until_(at, instead, next_from)
    parts[#parts + 1] = string.sub(head, from, at - 1)
    parts[#parts + 1] = instead
    from = next_from
  end
  for i = 0, events - 1 do
    local at = start + 44 * i
    if drops > 0 then
      local told = struct.unpack('<I4', head, at + 20)
      seq = told == 0xFFFFFFFF and seq + 1 or told
    end
    if drop[i] then
      until_(at, '', at + 44)
    else
      -- Behind a gap an event tells its place itself.
      if drop[i - 1] then until_(at + 20, struct.pack('<I4', seq), at + 24) end
      if tiled[i] then until_(at + 26, '\1', at + 27) end
    end
  end
  until_(#head + 1, '', 0)
  redis.call('SET', KEYS[1], table.concat(parts), 'PX', ARGV[12])
  return 1
end
for i in pairs(tiled) do redis.call('SETRANGE', KEYS[1], start - 1 + 44 * i + 26, '\1') end
if less ~= lost then redis.call('SETRANGE', KEYS[1], 20, struct.pack('<I4', less)) end
redis.call('PEXPIRE', KEYS[1], ARGV[12])
return 1
