-- One atomic step of the gateway for one entity of one transaction, where a script may touch one hash slot only.
--
-- KEYS  head, tiles
-- ARGV  1 update (1 or 0: read only), 2 head ttl ms, 3 most early hashes, 4 how many events the head counts, 5 ENTITY_RECORD (68 bytes)
-- Reply head before, place in the order of observation, tiles, frauds (empty where there is none)
local head, seq = observe_entity(KEYS[1], tonumber(ARGV[4]), ARGV[5], ARGV[1] == '1', ARGV[2], tonumber(ARGV[3]))
local stem = sub(KEYS[1], 1, -2)
local frauds = ''
if byte(ARGV[5], 3) == 1 then frauds = call('GET', stem .. 'l') or '' end
return {head, seq, call('GET', KEYS[2]) or '', frauds}
