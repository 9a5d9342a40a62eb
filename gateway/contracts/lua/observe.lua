-- One step of the gateway for a batch: claim idempotency records, append each transaction to its entities' heads, and return what
-- stood there before. In one transaction with the MGET that reads their tiles and frauds.
--
-- KEYS  progress, then for each transaction: its idempotency key, then the head key of each of its entities (the keys of tiles, early
--       list and frauds, which differ in the last letter, lie in the same hash slot and are derived)
-- ARGV  1 update (1 or 0: read only), 2 idempotency ttl ms, 3 head ttl ms, 4 most early hashes, 5 how many events a head counts
--       (2 bytes for each entity of contracts.features), then for each transaction: claim (fingerprint and position, 32 bytes),
--       ENTITY_RECORD (68 bytes) of each of its entities
-- Reply progress; the idempotency record of each transaction before (or false); the head of each entity with a short one before; the
--       places of all in the order of observation (4 bytes each). Heads and places of no transaction that its record settles: another
--       fingerprint, another position, or an answer to the HTTP door. A redelivery from the same position of Kafka is decided again,
--       since its first decision was never committed.
local update = ARGV[1] == '1'
local claim_ttl, head_ttl, early_max = ARGV[2], ARGV[3], tonumber(ARGV[4])
local capacities = {}
for i = 1, #ARGV[5] / 2 do capacities[i - 1] = unpack_('<I2', ARGV[5], 2 * i - 1) end
local appended = {}

-- The same as observe_entity for a head that is long: it isn't read here but by the MGET, after this transaction's event and those of
-- later ones in the batch, whose places tell them apart. So what an earlier one counts stays until the next batch. Only a transaction
-- that was claimed before, or may have been longer ago than claims live, is looked for in the head. Returns its place.
local function observe_long(head_key, capacity, record, claimed_before)
  local header = call('GETRANGE', head_key, 0, 23)
  local sound = #header == 24 and sub(header, 1, 8) == sub(record, 1, 8)
  local seq = 0
  if sound then
    seq = unpack_('<I4', header, 17)
    if claimed_before or byte(record, 17) == 1 then
      local own = place_in(call('GET', head_key), record)
      if own then return own end
    end
  end
  if not update then return seq end
  local event = stamped(head_key, record, seq, early_max)
  if not sound then
    born(head_key, record, event, seq, header ~= '', head_ttl)
    return seq
  end
  local size = call('APPEND', head_key, event)
  local own_batch = (appended[head_key] or 0) + 1
  appended[head_key] = own_batch
  local keep = capacity + own_batch
  if (size - 24) % 44 ~= 0 then
    -- Not whole records: nothing of it can be used.
    born(head_key, record, event, seq, true, head_ttl)
  elseif size - 24 > 44 * (keep + math.floor(capacity / 4)) then
    local lost, rest = evicted(call('GET', head_key), keep)
    call('SET', head_key, sub(header, 1, 16) .. pack('<I4I4', seq + 1, lost) .. rest, 'PX', head_ttl)
  else
    call('SETRANGE', head_key, 16, pack('<I4', seq + 1))
    call('PEXPIRE', head_key, head_ttl)
  end
  return seq
end

local records_before, heads, places, n, h = {}, {}, {}, 0, 0
local k = 2
for a = 6, #ARGV, 2 do
  local claim, records = ARGV[a], ARGV[a + 1]
  local before = false
  if update then
    if not call('SET', KEYS[k], claim, 'NX', 'PX', claim_ttl) then before = call('GET', KEYS[k]) end
  end
  k = k + 1
  records_before[#records_before + 1] = before
  if before and (sub(before, 1, 32) ~= claim or (#before > 32 and sub(claim, 17, 17) == 'h')) then
    k = k + #records / 68
  else
    for at = 1, #records, 68 do
      local record = sub(records, at, at + 67)
      local capacity, head, seq = capacities[byte(record, 2)], nil, nil
      if capacity > SHORT_EVENTS_MAX then
        seq = observe_long(KEYS[k], capacity, record, before)
      else
        head, seq = observe_entity(KEYS[k], capacity, record, update, head_ttl, early_max)
        h = h + 1
        heads[h] = head
      end
      n = n + 1
      places[n] = pack('<I4', seq)
      k = k + 1
    end
  end
end
return {call('GET', KEYS[1]), records_before, heads, table.concat(places)}
