-- Append one transaction to the head of one of its entities, once. Used by observe.lua (a batch at once) and observe_entity.lua (one
-- entity, for a cluster). The head itself is read by a command of its own, after this: a transaction's place in it tells what came before.
--
-- record  ENTITY_RECORD (68 bytes): HEAD_HEADER (24) for a head that is born now, whose byte 17 says that the head must be looked at
--         first, then HEAD_EVENT (44), whose byte 28 says that the Spark job has counted what arrived later, which decides where the
--         early list can't. It stands at `at` of `records`, and is cut out only where it is needed whole
-- capacity, others  how many events the head counts, and how many more must stay in it because a reader of this batch may count them
-- early_max  as many hashes as the early list may have: a full one has forgotten some
--
-- The usual way is one APPEND, whose reply tells all that must be known: each call from a script costs a microsecond or two, and Lua reads
-- each byte of each new string. A new head, one with an early list (4 bytes longer) and a full one show by their length, and are mended.
local sub, pack, unpack_, find, byte, floor = string.sub, struct.pack, struct.unpack, string.find, string.byte, math.floor
local call = redis.call

-- Where the events begin in a head of so many bytes (from 1), or nil: no whole events.
local function start_of(size)
  local rest = (size - 24) % 44
  if size < 68 or (rest ~= 0 and rest ~= 4) then return nil end
  return 25 + rest
end

local function is_sound(head, record)
  return start_of(#head) and sub(head, 1, 8) == sub(record, 1, 8)
end

local function holds(head, record)
  local start, txn = start_of(#head), sub(record, 25, 32)
  local at = start
  while true do
    at = find(head, txn, at, true)
    if not at or (at - start) % 44 == 0 then return at end
    at = at + 1
  end
end

-- '\1' when a tile holds the record's event already, for the Spark job may have come to it first (see merge.lua); and how many such
-- events the gateway has still to come to.
local function early_of(head_key, record, early_max)
  local tiles_key = sub(head_key, 1, -2) .. 't'
  local early = call('GETRANGE', tiles_key, '20', '23')
  if #early < 4 or early == '\0\0\0\0' then return '\0', 0 end
  local early_key = sub(head_key, 1, -2) .. 'e'
  local hashes, count = call('GET', early_key) or '', unpack_('<I4', early)
  local txn, at = sub(record, 25, 32), 1
  while true do
    at = find(hashes, txn, at, true)
    if not at or (at - 1) % 8 == 0 then break end
    at = at + 1
  end
  local forgotten = #hashes / 8 ~= count or #hashes / 8 >= early_max
  local tiled = '\0'
  if at or (forgotten and byte(record, 52) == 1) then tiled = '\1' end
  if at then
    -- Now it is observed: what is left of the list is what the tiles are ahead by.
    hashes = sub(hashes, 1, at - 1) .. sub(hashes, at + 8)
    count = #hashes / 8
    if hashes == '' then call('DEL', early_key) else call('SET', early_key, hashes, 'KEEPTTL') end
    call('SETRANGE', tiles_key, '20', pack('<I4', count))
  end
  return tiled, count
end

-- What stands behind a head's header while the entity has an early list.
local function early_mark(count)
  return count > 0 and pack('<I4', count) or ''
end

local function marked(record, tiled)
  return sub(record, 25, 50) .. tiled .. sub(record, 52)
end

-- A new head. When something stood there, no head of this layout and key, events are missing: the counter of the evicted says so.
local function born(head_key, record, stood, ttl_ms, early_max)
  local tiled, early = early_of(head_key, record, early_max)
  local event = marked(record, tiled)
  local header = sub(record, 1, 16) .. pack('<I4I4', 0, stood and 1 or 0) .. early_mark(early)
  call('SET', head_key, header .. sub(event, 1, 20) .. '\0\0\0\0' .. sub(event, 25), 'PX', ttl_ms)
end

-- The head without its oldest `drop` events, and how many of them no tile holds yet: the value is short of those.
local function without(events, drop)
  local seq, lost = 0, 0
  for i = 0, drop do
    local told = unpack_('<I4', events, 44 * i + 21)
    seq = told == 0xFFFFFFFF and seq + 1 or told
    if i < drop and byte(events, 44 * i + 27) == 0 then lost = lost + 1 end
  end
  local at = 44 * drop
  -- The first event of a head tells its place.
  return sub(events, at + 1, at + 20) .. pack('<I4', seq) .. sub(events, at + 25), lost
end

-- The event is the last 44 of the head's `size` bytes now.
local function mended(head_key, capacity, others, record, size, ttl_ms, early_max)
  local head = size > 44 and call('GET', head_key) or ''
  local start = start_of(size)
  if not start or not start_of(size - 44) or sub(head, 1, 8) ~= sub(record, 1, 8) then
    born(head_key, record, size > 44, ttl_ms, early_max)
    return
  end
  local tiled, early = early_of(head_key, record, early_max)
  local events, lost = sub(head, start, -45) .. marked(record, tiled), 0
  local keep = capacity + others
  if #events / 44 > keep + floor(capacity / 4) then events, lost = without(events, #events / 44 - keep) end
  local header = sub(head, 1, 20) .. pack('<I4', unpack_('<I4', head, 21) + lost) .. early_mark(early)
  call('SET', head_key, header .. events, 'PX', ttl_ms)
end

local function observe_entity(head_key, capacity, others, records, at, look, ttl_ms, early_max)
  if look or byte(records, at + 16) == 1 then
    local head, record = call('GET', head_key), sub(records, at, at + 67)
    if head and not is_sound(head, record) then
      born(head_key, record, true, ttl_ms, early_max)
      return
    end
    if head and holds(head, record) then return end
  end
  local size = call('APPEND', head_key, sub(records, at + 24, at + 67))
  if size < 112 or (size - 24) % 44 ~= 0 or size > 24 + 44 * (capacity + others + floor(capacity / 4)) then
    mended(head_key, capacity, others, sub(records, at, at + 67), size, ttl_ms, early_max)
  end
end
