"""Every bound of the project in one place, units last in the name.

A length, count or time that comes from outside is compared with one of these before anything is
allocated or waited for. The relations between them are asserted at import.
"""

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB
TIB: Final = 1024 * GIB

# Geometry of the device.
EXTENT_BYTES_DEFAULT: Final = 4 * KIB
EXTENT_BYTES_MIN: Final = 4 * KIB
EXTENT_BYTES_MAX: Final = 1 * MIB
REGION_BYTES_DEFAULT: Final = 4 * MIB
REGION_BYTES_MIN: Final = 1 * MIB
REGION_BYTES_MAX: Final = 256 * MIB
DEVICE_BYTES_MIN: Final = 1 * MIB
DEVICE_BYTES_MAX: Final = 16 * TIB

# Metadata file.
META_BLOCK_BYTES: Final = 4 * KIB
SUPERBLOCK_SLOT_OFFSETS_BYTES: Final = (0, 32 * KIB)
LOG_OFFSET_BYTES: Final = 64 * KIB
LOG_BLOCKS_COUNT: Final = 64
LOG_SECTOR_BYTES: Final = 512
MAP_OFFSET_BYTES: Final = 1 * MIB
MAP_PAGE_HEADER_BYTES: Final = 64
MAP_PAGE_PAYLOAD_BYTES: Final = META_BLOCK_BYTES - MAP_PAGE_HEADER_BYTES
BASE_COUNT_MAX: Final = 8
HISTORY_COUNT_MAX: Final = 16
MIRROR_NAME_CHARS_MAX: Final = 64

# Frames of the peer channel.
FRAME_PAYLOAD_BYTES_MAX: Final = 1 * MIB
FRAME_SPAN_BYTES_MAX: Final = 1 * GIB
CONTROL_BYTES_MAX: Final = 64 * KIB
REASON_BYTES_MAX: Final = 1024
HANDSHAKE_BYTES_MAX: Final = 4 * KIB
WINDOW_BYTES_MAX: Final = 32 * MIB
WINDOW_ENTRIES_MAX: Final = 1024
KEY_BYTES_MIN: Final = 32
KEY_BYTES_MAX: Final = 4 * KIB

RELAY_BYTES_MAX: Final = 2 * KIB

# TLS around the peer channel.
TLS_RECORD_BYTES: Final = 16 * KIB  # of plaintext, at most (RFC 8446, 5.1)
TLS_BATCH_BYTES: Final = 256 * KIB  # encrypted at once, and at most so much waits for the socket
TLS_READ_BYTES: Final = 256 * KIB
TLS_ANSWERS_BYTES_MAX: Final = 64 * KIB  # what OpenSSL itself wants to say to a peer not reading
TLS_HANDSHAKE_BYTES_MAX: Final = 128 * KIB
# AES-GCM may protect 2^24.5 records, 23.7 million, with one key (RFC 8446, 5.5). Who sends data
# begins a new connection, with other keys, when one direction has had TLS_RECORDS_RENEW; no end
# sends more than TLS_RECORDS_MAX.
TLS_RECORDS_RENEW: Final = 1 << 24
TLS_RECORDS_MAX: Final = 5 << 22
TLS_CERTIFICATE_BYTES_MAX: Final = 64 * KIB
TLS_CA_BYTES_MAX: Final = 1 * MIB
TLS_CERTIFICATE_DAYS: Final = 3_650
TLS_CERTIFICATE_WARN_DAYS: Final = 30

# NBD requests.
NBD_REQUEST_BYTES_MAX: Final = 64 * MIB
NBD_RANGE_BYTES_MAX: Final = 4 * GIB - 1

# Time. Every wait of ours has one of these.
HANDSHAKE_TIMEOUT_MS: Final = 5_000
ACK_TIMEOUT_MS: Final = 2_000
KEEPALIVE_MS: Final = 500
READ_LEASE_MS: Final = 1_000
READ_LEASE_MS_MIN: Final = 300
READ_LEASE_MS_MAX: Final = 120_000
READ_LEASE_DRIFT_SHARE: Final = 16  # clocks that run apart by more than this part are broken
SILENCE_MS: Final = 1_500
TCP_USER_TIMEOUT_MS: Final = 2_000
RECONNECT_MS_MIN: Final = 50
RECONNECT_MS_MAX: Final = 1_000
FLUSH_INTERVAL_MS: Final = 500
FLUSH_BYTES: Final = 64 * MIB
UNFLUSHED_ENTRIES_MAX: Final = 65_536
FREEZE_LIMIT_MS: Final = 30_000
KEEP_BYTES: Final = 1 * GIB
KEEP_BYTES_MAX: Final = 16 * TIB
COMMAND_TIMEOUT_MS: Final = 60_000
QUIESCE_TIMEOUT_MS: Final = 10_000
NEGOTIATION_TIMEOUT_MS: Final = 10_000
CONTROL_ANSWER_TIMEOUT_MS: Final = 10_000

# The controller.
HEARTBEAT_MS: Final = 200
HEARTBEAT_MS_MIN: Final = 20
HEARTBEAT_MS_MAX: Final = 10_000
SILENCE_MS_MAX: Final = 120_000
PING_TIMEOUT_MS: Final = 500
PING_TIMEOUT_MS_MIN: Final = 50
PING_TIMEOUT_MS_MAX: Final = 5_000
ARBITER_TIMEOUT_MS: Final = 1_000
ARBITER_TIMEOUT_MS_MIN: Final = 100
ARBITER_TIMEOUT_MS_MAX: Final = 10_000
ARBITER_ENDPOINTS_MAX: Final = 16
ARBITER_SECRET_BYTES_MAX: Final = 64 * KIB
PROBE_PORT: Final = 9010
SCRIPT_TIMEOUT_S: Final = 300
SCRIPT_TIMEOUT_S_MAX: Final = 86_400
CHECK_INTERVAL_MS: Final = 2_000
CHECK_INTERVAL_MS_MIN: Final = 100
CHECK_INTERVAL_MS_MAX: Final = 3_600_000
CHECK_TIMEOUT_MS: Final = 2_000
CHECKERS_MAX: Final = 64
VIRTUAL_ADDRESSES_MAX: Final = 16
ACTIONS_MAX: Final = 3
ACTION_WINDOW_H: Final = 24
CONTROLLER_LOST_MS: Final = 10_000
ATTENDED_MS: Final = 3_000  # a controller that has not polled for so long attends to nothing
ENGINE_RESTARTS_MAX: Final = 3
ENGINE_RESTART_WINDOW_MS: Final = 600_000
ENGINE_PING_TIMEOUT_MS: Final = 1_000  # an engine that misses two in a row is killed

# sun_path of unix(7) has 108 bytes with the closing zero.
SOCKET_PATH_BYTES_MAX: Final = 107

# Resync.
RESYNC_CHUNK_BYTES: Final = 1 * MIB
HASH_BLOCK_BYTES: Final = 32 * KIB
HASH_BYTES: Final = 16
RESYNC_CHUNKS_AHEAD: Final = 8

assert FRAME_PAYLOAD_BYTES_MAX % EXTENT_BYTES_MAX == 0
assert RESYNC_CHUNK_BYTES <= FRAME_PAYLOAD_BYTES_MAX
assert REGION_BYTES_MIN % EXTENT_BYTES_MAX == 0
assert RESYNC_CHUNK_BYTES % HASH_BLOCK_BYTES == 0
assert LOG_OFFSET_BYTES + LOG_BLOCKS_COUNT * META_BLOCK_BYTES <= MAP_OFFSET_BYTES
assert SUPERBLOCK_SLOT_OFFSETS_BYTES[1] + META_BLOCK_BYTES <= LOG_OFFSET_BYTES
assert WINDOW_BYTES_MAX >= 2 * FRAME_PAYLOAD_BYTES_MAX
assert KEEPALIVE_MS * 3 <= SILENCE_MS
assert READ_LEASE_MS_MIN <= READ_LEASE_MS < SILENCE_MS
assert SILENCE_MS <= ACK_TIMEOUT_MS
assert HEARTBEAT_MS * 5 <= SILENCE_MS
assert TLS_RECORDS_RENEW < TLS_RECORDS_MAX < 2**24.5
