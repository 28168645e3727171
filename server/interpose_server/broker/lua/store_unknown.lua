-- ARGV: (name object)... Returns the objects that hold no blob and aren't about to be deleted anyway.
local found = {}
for i = 1, #ARGV, 2 do
    local entry = redis.call('HGET', STORED, ARGV[i])
    if object_of(entry) ~= ARGV[i + 1] and not redis.call('ZSCORE', TRASH, ARGV[i + 1]) then table.insert(found, ARGV[i + 1]) end
end
return found
