-- One step of the gateway for a batch: claim idempotency records, append each transaction to its entities' heads, and return what
-- stood there before. In one transaction with the MGET that reads their tiles and frauds.
--
-- KEYS  progress, then for each transaction: its idempotency key, then the head key of each of its entities (the keys of tiles, early
--       list and frauds, which differ in the last letter, lie in the same hash slot and are derived)
-- ARGV  1 update (1 or 0: read only), 2 idempotency ttl ms, 3 head ttl ms, 4 most early hashes, 5 how many events a head counts
--       (2 bytes for each entity of contracts.features), then for each transaction: claim (fingerprint and position, 32 bytes),
--       ENTITY_RECORD (68 bytes) of each of its entities
-- Reply progress; the idempotency record of each transaction before (or false); the head of each entity before, and their places in
--       the order of observation (4 bytes each), but of no transaction that its record settles: another fingerprint, another position,
--       or an answer to the HTTP door. A redelivery from the same position of Kafka is decided again, since its first decision was
--       never committed.
local update = ARGV[1] == '1'
local claim_ttl, head_ttl, early_max = ARGV[2], ARGV[3], tonumber(ARGV[4])
local capacities = {}
for i = 1, #ARGV[5] / 2 do capacities[i - 1] = unpack_('<I2', ARGV[5], 2 * i - 1) end
local records_before, heads, places, n = {}, {}, {}, 0
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
      local head, seq = observe_entity(KEYS[k], capacities[byte(record, 2)], record, update, head_ttl, early_max)
      n = n + 1
      heads[n] = head
      places[n] = pack('<I4', seq)
      k = k + 1
    end
  end
end
return {call('GET', KEYS[1]), records_before, heads, table.concat(places)}
