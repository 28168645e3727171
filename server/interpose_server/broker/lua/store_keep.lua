-- ARGV: name ttl_ms. A blob is to live for at least so long from now. Returns its entry, if there is one.
local entry = redis.call('HGET', STORED, ARGV[1])
if entry then redis.call('ZADD', STORED_ENDS, 'GT', now() + ARGV[2], ARGV[1]) end
return entry
