-- One atomic step of the gateway for a batch: claim idempotency records, append each transaction to its entities' heads,
-- and return what stood there before, with the tiles.
--
-- KEYS  progress, then for each transaction: its idempotency key, then head and tiles key of each of its entities (the key of the
--       early list, which differs from the tiles key in its last letter, lies in the same hash slot and is derived)
-- ARGV  1 update (1 or 0: read only), 2 idempotency ttl ms, 3 head ttl ms,
--       then for each transaction: claim (fingerprint and position, 32 bytes), number of entities,
--       then for each entity: capacity, head header for a new head (16 bytes), packed event (48 bytes)
-- Reply progress, then for each transaction: its idempotency record before (or false), then, unless the record settles it
--       (another fingerprint, another position, or an answer to the HTTP door), for each entity: head, tiles, own seq.
--       A redelivery from the same position of Kafka is decided again, since its first decision was never committed.
local update = ARGV[1] == '1'
local reply = {redis.call('GET', KEYS[1])}
local k, a = 2, 4
while a <= #ARGV do
  local claim, entities = ARGV[a], tonumber(ARGV[a + 1])
  a = a + 2
  local before = false
  if update then
    if not redis.call('SET', KEYS[k], claim, 'NX', 'PX', ARGV[2]) then before = redis.call('GET', KEYS[k]) end
  end
  k = k + 1
  reply[#reply + 1] = before
  if before and (string.sub(before, 1, 32) ~= claim or (#before > 32 and string.sub(claim, 17, 17) == 'h')) then
    k = k + 2 * entities
    a = a + 3 * entities
  else
    for _ = 1, entities do
      local head_key, tiles_key = KEYS[k], KEYS[k + 1]
      local capacity, header, event = tonumber(ARGV[a]), ARGV[a + 1], ARGV[a + 2]
      k = k + 2
      a = a + 3
      local head = redis.call('GET', head_key) or ''
      local seq = 0
      local own = nil
      local sound = #head >= 16 and (#head - 16) % 48 == 0 and string.sub(head, 1, 8) == string.sub(header, 1, 8)
      if sound then
        local b1, b2, b3, b4 = string.byte(head, 9, 12)
        seq = b1 + b2 * 256 + b3 * 65536 + b4 * 16777216
        -- Idempotent: an event that stands here already keeps its place.
        local txn = string.sub(event, 1, 8)
        local at = 17
        while true do
          at = string.find(head, txn, at, true)
          if not at then break end
          if (at - 17) % 48 == 0 then
            own = at
            break
          end
          at = at + 1
        end
      end
      if own then
        local b1, b2, b3, b4 = string.byte(head, own + 20, own + 23)
        seq = b1 + b2 * 256 + b3 * 65536 + b4 * 16777216
      elseif update then
        local stamped = string.sub(event, 1, 20) .. struct.pack('<I4', seq) .. string.sub(event, 25)
        -- The Spark job may have come to it first (see merge.lua): then a tile holds it already.
        local early = redis.call('GETRANGE', tiles_key, 20, 23)
        if #early == 4 and early ~= '\0\0\0\0' then
          local hashes = redis.call('GET', string.sub(tiles_key, 1, -2) .. 'e') or ''
          local txn, at = string.sub(event, 1, 8), 1
          while true do
            at = string.find(hashes, txn, at, true)
            if not at then break end
            if (at - 1) % 8 == 0 then
              stamped = string.sub(stamped, 1, 44) .. '\1' .. string.sub(stamped, 46)
              break
            end
            at = at + 1
          end
        end
        if not sound then
          -- New, or no head of this layout and key: then events are missing, which the counter of the evicted says.
          local lost = head == '' and 0 or 1
          redis.call('SET', head_key, string.sub(header, 1, 8) .. struct.pack('<I4I4', seq + 1, lost) .. stamped, 'PX', ARGV[3])
        elseif #head - 16 >= 48 * (capacity + math.floor(capacity / 4)) then
          -- Full: the oldest go, and those that no tile holds yet are counted, for then the value is short of them.
          local drop = (#head - 16) / 48 - capacity + 1
          local lost = struct.unpack('<I4', string.sub(head, 13, 16))
          for i = 0, drop - 1 do
            if string.byte(head, 17 + 48 * i + 44) == 0 then lost = lost + 1 end
          end
          redis.call('SET', head_key, string.sub(head, 1, 8) .. struct.pack('<I4I4', seq + 1, lost)
            .. string.sub(head, 17 + 48 * drop) .. stamped, 'PX', ARGV[3])
        else
          redis.call('APPEND', head_key, stamped)
          redis.call('SETRANGE', head_key, 8, struct.pack('<I4', seq + 1))
          redis.call('PEXPIRE', head_key, ARGV[3])
        end
      end
      reply[#reply + 1] = head
      reply[#reply + 1] = redis.call('GET', tiles_key) or ''
      reply[#reply + 1] = seq
    end
  end
end
return reply
