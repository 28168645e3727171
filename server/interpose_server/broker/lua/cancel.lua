-- ARGV: ref problem ttl_ms. Returns the status the job is left in, or false.
become(ARGV[1], 'cancelled', ARGV[2], tonumber(ARGV[3]))
return redis.call('HGET', JOB(ARGV[1]), 'status')
