-- One atomic step of the gateway for one entity of one transaction, where a script may touch one hash slot only.
--
-- KEYS  head, tiles
-- ARGV  1 update (1 or 0: read only), 2 head ttl ms, 3 most early hashes, 4 how many events the head counts, 5 ENTITY_RECORD (68 bytes)
-- Reply head with this transaction, tiles, frauds (empty where there is none)
if ARGV[1] == '1' then
  observe_entity(KEYS[1], tonumber(ARGV[4]), 1, ARGV[5], 1, false, ARGV[2], tonumber(ARGV[3]))
end
local frauds = ''
if byte(ARGV[5], 3) == 1 then frauds = call('GET', sub(KEYS[1], 1, -2) .. 'l') or '' end
return {call('GET', KEYS[1]) or '', call('GET', KEYS[2]) or '', frauds}
