-- ARGV: model most running_per_user. Refs, fairest first.
return fair(ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]))
