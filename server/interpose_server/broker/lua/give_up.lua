-- ARGV: model problem ttl_ms silent_ms. Ends the jobs that wait for a model which nothing is left to run; a silence
-- of 0 counts all copies as gone. Returns their refs.
return give_up(ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]))
