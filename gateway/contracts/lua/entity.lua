-- Append one transaction to the head of one of its entities, and return what stood there before with the entity's tiles and frauds.
-- Used by observe.lua (a batch at once) and observe_entity.lua (one entity, for a cluster).
--
-- header  HEAD_HEADER (24 bytes) for a head that is born now; its flags say whether the entity has label counts
-- event   HEAD_EVENT (44 bytes); its place in the order of observation is filled in here; its byte 28 says that the Spark job has
--         counted what arrived later, which decides where the early list can't
-- early_max  as many hashes as the early list may have: a full one has forgotten some
-- Returns head, tiles, frauds (empty where there is none), and the transaction's place behind the head's base.
-- Idempotent: an event that stands in the head already keeps its place.
local function observe_entity(head_key, tiles_key, capacity, header, event, update, ttl_ms, early_max)
  local head = redis.call('GET', head_key) or ''
  local seq = 0
  local own = nil
  local sound = #head >= 24 and (#head - 24) % 44 == 0 and string.sub(head, 1, 8) == string.sub(header, 1, 8)
  if sound then
    seq = struct.unpack('<I4', string.sub(head, 17, 20))
    local txn = string.sub(event, 1, 8)
    local at = 25
    while true do
      at = string.find(head, txn, at, true)
      if not at then break end
      if (at - 25) % 44 == 0 then
        own = at
        break
      end
      at = at + 1
    end
  end
  if own then
    seq = struct.unpack('<I4', string.sub(head, own + 20, own + 23))
  elseif update then
    local stamped = string.sub(event, 1, 20) .. struct.pack('<I4', seq) .. string.sub(event, 25)
    -- The Spark job may have come to it first (see merge.lua): then a tile holds it already.
    local early = redis.call('GETRANGE', tiles_key, 20, 23)
    if #early == 4 and early ~= '\0\0\0\0' then
      local early_key = string.sub(tiles_key, 1, -2) .. 'e'
      local hashes = redis.call('GET', early_key) or ''
      local txn, at = string.sub(event, 1, 8), 1
      while true do
        at = string.find(hashes, txn, at, true)
        if not at or (at - 1) % 8 == 0 then break end
        at = at + 1
      end
      local forgotten = #hashes / 8 ~= struct.unpack('<I4', early) or #hashes / 8 >= early_max
      if at or (forgotten and string.byte(event, 28) == 1) then
        stamped = string.sub(stamped, 1, 26) .. '\1' .. string.sub(stamped, 28)
      end
      if at then
        -- Now it is observed: what is left of the list is what the tiles are ahead by.
        hashes = string.sub(hashes, 1, at - 1) .. string.sub(hashes, at + 8)
        if hashes == '' then redis.call('DEL', early_key) else redis.call('SET', early_key, hashes, 'KEEPTTL') end
        redis.call('SETRANGE', tiles_key, 20, struct.pack('<I4', #hashes / 8))
      end
    end
    if not sound then
      -- New, or no head of this layout and key: then events are missing, which the counter of the evicted says.
      local lost = head == '' and 0 or 1
      redis.call('SET', head_key, string.sub(header, 1, 16) .. struct.pack('<I4I4', seq + 1, lost) .. stamped, 'PX', ttl_ms)
    elseif #head - 24 >= 44 * (capacity + math.floor(capacity / 4)) then
      -- Full: the oldest go, and those that no tile holds yet are counted, for then the value is short of them.
      local drop = (#head - 24) / 44 - capacity + 1
      local lost = struct.unpack('<I4', string.sub(head, 21, 24))
      for i = 0, drop - 1 do
        if string.byte(head, 25 + 44 * i + 26) == 0 then lost = lost + 1 end
      end
      redis.call('SET', head_key, string.sub(head, 1, 16) .. struct.pack('<I4I4', seq + 1, lost)
        .. string.sub(head, 25 + 44 * drop) .. stamped, 'PX', ttl_ms)
    elseif #head < 2048 then
      -- Written whole: APPEND would double the memory of a small value.
      redis.call('SET', head_key, string.sub(head, 1, 16) .. struct.pack('<I4', seq + 1) .. string.sub(head, 21) .. stamped,
        'PX', ttl_ms)
    else
      redis.call('APPEND', head_key, stamped)
      redis.call('SETRANGE', head_key, 16, struct.pack('<I4', seq + 1))
      redis.call('PEXPIRE', head_key, ttl_ms)
    end
  end
  local frauds = ''
  if string.byte(header, 3) == 1 then frauds = redis.call('GET', string.sub(tiles_key, 1, -2) .. 'l') or '' end
  return head, redis.call('GET', tiles_key) or '', frauds, seq
end
