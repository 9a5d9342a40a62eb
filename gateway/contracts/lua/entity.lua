-- Append one transaction to the head of one of its entities, and return what stood there before.
-- Used by observe.lua (a batch at once) and observe_entity.lua (one entity, for a cluster).
--
-- record  ENTITY_RECORD (68 bytes): HEAD_HEADER (24) for a head that is born now, whose flags say whether the entity has label counts,
--         then HEAD_EVENT (44); its place in the order of observation is filled in here; its byte 28 says that the Spark job has
--         counted what arrived later, which decides where the early list can't
-- early_max  as many hashes as the early list may have: a full one has forgotten some
-- Returns head (empty where there is none) and the transaction's place behind the head's base.
-- Idempotent: an event that stands in the head already keeps its place.
-- Lua reads each byte of each new string: what needs no look, such as tiles, is better read by other commands beside the script.
local sub, pack, unpack_, find, byte = string.sub, struct.pack, struct.unpack, string.find, string.byte
local call = redis.call

-- The event of `record` as it enters a head at place `seq`.
local function stamped(head_key, record, seq, early_max)
  local tiled = sub(record, 51, 51)
  -- The Spark job may have come to it first (see merge.lua): then a tile holds it already.
  local tiles_key = sub(head_key, 1, -2) .. 't'
  local early = call('GETRANGE', tiles_key, 20, 23)
  if #early == 4 and early ~= '\0\0\0\0' then
    local early_key = sub(head_key, 1, -2) .. 'e'
    local hashes = call('GET', early_key) or ''
    local txn, at = sub(record, 25, 32), 1
    while true do
      at = find(hashes, txn, at, true)
      if not at or (at - 1) % 8 == 0 then break end
      at = at + 1
    end
    local forgotten = #hashes / 8 ~= unpack_('<I4', early) or #hashes / 8 >= early_max
    if at or (forgotten and byte(record, 52) == 1) then tiled = '\1' end
    if at then
      -- Now it is observed: what is left of the list is what the tiles are ahead by.
      hashes = sub(hashes, 1, at - 1) .. sub(hashes, at + 8)
      if hashes == '' then call('DEL', early_key) else call('SET', early_key, hashes, 'KEEPTTL') end
      call('SETRANGE', tiles_key, 20, pack('<I4', #hashes / 8))
    end
  end
  return sub(record, 25, 44) .. pack('<I4', seq) .. sub(record, 49, 50) .. tiled .. sub(record, 52)
end

-- The place of the record's transaction in a head that holds it already, or nil.
local function place_in(head, record)
  local txn, at = sub(record, 25, 32), 25
  while true do
    at = find(head, txn, at, true)
    if not at then return nil end
    if (at - 25) % 44 == 0 then return unpack_('<I4', head, at + 20) end
    at = at + 1
  end
end

-- A new head. When something stood there, no head of this layout and key, events are missing: the counter of the evicted says so.
local function born(head_key, record, event, seq, stood, ttl_ms)
  call('SET', head_key, sub(record, 1, 16) .. pack('<I4I4', seq + 1, stood and 1 or 0) .. event, 'PX', ttl_ms)
end

-- Let the oldest go but `keep`. Those that no tile holds yet are counted, for then the value is short of them.
local function evicted(head, keep)
  local drop = (#head - 24) / 44 - keep
  local lost = unpack_('<I4', head, 21)
  for i = 0, drop - 1 do
    if byte(head, 25 + 44 * i + 26) == 0 then lost = lost + 1 end
  end
  return lost, sub(head, 25 + 44 * drop)
end

local function observe_entity(head_key, capacity, record, update, ttl_ms, early_max)
  local head = call('GET', head_key) or ''
  local size = #head
  local seq = 0
  local own = nil
  local sound = size >= 24 and (size - 24) % 44 == 0 and sub(head, 1, 8) == sub(record, 1, 8)
  if sound then
    seq = unpack_('<I4', head, 17)
    own = place_in(head, record)
  end
  if own then return head, own end
  if update then
    local event = stamped(head_key, record, seq, early_max)
    if not sound then
      born(head_key, record, event, seq, head ~= '', ttl_ms)
    elseif size - 24 >= 44 * (capacity + math.floor(capacity / 4)) then
      local lost, rest = evicted(head, capacity - 1)
      call('SET', head_key, sub(head, 1, 16) .. pack('<I4I4', seq + 1, lost) .. rest .. event, 'PX', ttl_ms)
    elseif size < 2048 then
      -- Written whole: APPEND would double the memory of a small value.
      call('SET', head_key, sub(head, 1, 16) .. pack('<I4', seq + 1) .. sub(head, 21) .. event, 'PX', ttl_ms)
    else
      call('APPEND', head_key, event)
      call('SETRANGE', head_key, 16, pack('<I4', seq + 1))
      call('PEXPIRE', head_key, ttl_ms)
    end
  end
  return head, seq
end
