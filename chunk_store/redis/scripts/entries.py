"""Entries: put, adopted, dropped."""

# Makes a blob the entry of its key. Local function of COMMIT and ADOPT.
# ARGV from 3 on: blob, chunk (SID), model, tenant, tokens, bytes, bytes stored, context keys...
PUT_ENTRY = r"""
local function put_entry(key)
  local blob, chunk, model = ARGV[3], ARGV[4], ARGV[5]
  local old = redis.call('HMGET', P..'entry:'..key, 'blob', 'stored')
  if old[1] then
    redis.call('HSET', P..'entry:'..key, 'blob', blob)
    redis.call('SREM', P..'doomed', key)
    trash(old[1], tonumber(old[2]))
  else
    local needs = {}
    for i = 10, #ARGV do
      local needed = redis.call('HGET', P..'entry:'..ARGV[i], 'chunk') or redis.call('HGET', P..'buried', ARGV[i])
      if needed then
        needs[#needs + 1] = needed
        redis.call('SADD', P..'needs:'..needed, key)
      end
    end
    redis.call('HSET', P..'entry:'..key, 'blob', blob, 'chunk', chunk, 'model', model, 'salt', ARGV[6],
      'tokens', ARGV[7], 'nbytes', ARGV[8], 'stored', ARGV[9], 'created', num(now), 'needs', table.concat(needs, ' '))
    redis.call('ZADD', P..'used', num(now), key)
    redis.call('SADD', P..'chunk:'..chunk, key)
    redis.call('SADD', P..'model:'..model, key)
    note(ARGV[6])
    add_for(ARGV[6], 'entries', 1)
    add_for(ARGV[6], 'entry_nbytes', tonumber(ARGV[9]))
  end
  unbury(key)
end
"""

# ARGV: key, nothing, then as PUT_ENTRY. Returns 0 when the key has an entry or a claim.
ADOPT = (
    PUT_ENTRY
    + r"""
local key = ARGV[1]
if redis.call('EXISTS', P..'claim:'..key) == 1 then return 0 end
if redis.call('EXISTS', P..'entry:'..key) == 1 and redis.call('SISMEMBER', P..'doomed', key) == 0 then return 0 end
put_entry(key)
return 1
"""
)

# ARGV: key, blob, 1 if bad. Returns 1 if the entry had this blob.
FORGET = r"""
if redis.call('HGET', P..'entry:'..ARGV[1], 'blob') ~= ARGV[2] then return 0 end
drop_entry(ARGV[1])
if ARGV[3] == '1' then add('quarantined', 1) end
return 1
"""

# ARGV: model. Returns entries, bytes.
DELETE_MODEL = r"""
local entries, nbytes = delete_entries(P..'model:'..ARGV[1])
return {entries, int(nbytes)}
"""
