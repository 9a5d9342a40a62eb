-- One atomic step of the gateway for one entity of one transaction, where a script may touch one hash slot only.
--
-- KEYS  head, tiles
-- ARGV  1 update (1 or 0: read only), 2 head ttl ms, 3 capacity, 4 head header for a new head (24 bytes), 5 packed event (44 bytes),
--       6 most early hashes
-- Reply head, tiles, frauds, own place
return {observe_entity(KEYS[1], KEYS[2], tonumber(ARGV[3]), ARGV[4], ARGV[5], ARGV[1] == '1', ARGV[2], tonumber(ARGV[6]))}
