-- ARGV: name grace_ms object. Forget a blob; with an object, only if it is in that one.
local entry = redis.call('HGET', STORED, ARGV[1])
if entry and (ARGV[3] == '' or object_of(entry) == ARGV[3]) then forget(ARGV[1], entry, ARGV[2]) end
