"""The versions of what is stored: whoever changes a format raises its number here, and reads or migrates the older."""

ENTRY_VERSION = 1  # of an entry's header and data: format/header.py
INDEX_VERSION = 4  # of the tables of a directory's index: local/schema.py
REDIS_VERSION = 2  # of the keys in Redis: redis/scripts/
ARCHIVE_VERSION = 1  # of what `cairn store export` writes: tools/archive_members.py
