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
local function observe_entity(head_key, capacity, record, update, ttl_ms, early_max)
  local head = call('GET', head_key) or ''
  local size = #head
  local seq = 0
  local own = nil
  local sound = size >= 24 and (size - 24) % 44 == 0 and sub(head, 1, 8) == sub(record, 1, 8)
  if sound then
    seq = unpack_('<I4', head, 17)
    local txn = sub(record, 25, 32)
    local at = 25
    while true do
      at = find(head, txn, at, true)
      if not at then break end
      if (at - 25) % 44 == 0 then
        own = at
        break
      end
      at = at + 1
    end
  end
  if own then
    seq = unpack_('<I4', head, own + 20)
  elseif update then
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
    local stamped = sub(record, 25, 44) .. pack('<I4', seq) .. sub(record, 49, 50) .. tiled .. sub(record, 52)
    if not sound then
      -- New, or no head of this layout and key: then events are missing, which the counter of the evicted says.
      local lost = head == '' and 0 or 1
      call('SET', head_key, sub(record, 1, 16) .. pack('<I4I4', seq + 1, lost) .. stamped, 'PX', ttl_ms)
    elseif size - 24 >= 44 * (capacity + math.floor(capacity / 4)) then
      -- Full: the oldest go, and those that no tile holds yet are counted, for then the value is short of them.
      local drop = (size - 24) / 44 - capacity + 1
      local lost = unpack_('<I4', head, 21)
      for i = 0, drop - 1 do
        if byte(head, 25 + 44 * i + 26) == 0 then lost = lost + 1 end
      end
      call('SET', head_key, sub(head, 1, 16) .. pack('<I4I4', seq + 1, lost) .. sub(head, 25 + 44 * drop) .. stamped, 'PX', ttl_ms)
    elseif size < 2048 then
      -- Written whole: APPEND would double the memory of a small value.
      call('SET', head_key, sub(head, 1, 16) .. pack('<I4', seq + 1) .. sub(head, 21) .. stamped, 'PX', ttl_ms)
    else
      call('APPEND', head_key, stamped)
      call('SETRANGE', head_key, 16, pack('<I4', seq + 1))
      call('PEXPIRE', head_key, ttl_ms)
    end
  end
  return head, seq
end
