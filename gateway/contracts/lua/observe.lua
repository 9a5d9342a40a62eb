-- One step of the gateway for a batch: claim idempotency records and append each transaction to its entities' heads. In one transaction
-- with the MGET that reads heads, tiles and frauds behind it.
--
-- KEYS  for each transaction: its idempotency key, then the head key of each of its entities (the keys of tiles and early list, which
--       differ in the last letter, lie in the same hash slot and are derived)
-- ARGV  1 idempotency ttl ms, 2 head ttl ms, 3 most early hashes, 4 how many events a head counts (2 bytes for each entity of
--       contracts.features), 5 '1' when all of these have been decided and are observed afterwards, then for each transaction: claim
--       (fingerprint and position, 32 bytes), ENTITY_RECORD (68 bytes) of each of its entities
-- Reply the idempotency record of each transaction before (or false). What its record settles is not observed: another fingerprint,
--       another position, or an answer to the HTTP door unless it is the transaction's own that is observed afterwards. A redelivery from the same position of Kafka is decided again, since its first
--       decision was never committed.
local claim_ttl, head_ttl, early_max = ARGV[1], ARGV[2], tonumber(ARGV[3])
local capacities = {}
for i = 1, #ARGV[4] / 2 do capacities[i - 1] = unpack_('<I2', ARGV[4], 2 * i - 1) end

local records_before, row = {}, 0
local k = 1
local answered = ARGV[5] == '1'
for a = 6, #ARGV, 2 do
  local claim, records = ARGV[a], ARGV[a + 1]
  local before = call('SET', KEYS[k], claim, 'NX', 'GET', 'PX', claim_ttl)
  k = k + 1
  row = row + 1
  records_before[row] = before
  if before and (sub(before, 1, 32) ~= claim or (#before > 32 and not answered and sub(claim, 17, 17) == 'h')) then
    k = k + #records / 68
  else
    -- Heads are read after the whole batch: what this transaction counts must outlive all of the batch up to here.
    for at = 1, #records, 68 do
      observe_entity(KEYS[k], capacities[byte(records, at + 1)], row, records, at, before, head_ttl, early_max)
      k = k + 1
    end
  end
end
return records_before
