"""The frames of the transfer protocol as ``hixl_wire.h`` lays them out, for tests that write them by hand."""
import struct

HELLO = struct.Struct("<QHHI16s16s16s")
WELCOME = struct.Struct("<QHHI16s16s48sQQ")
REQUEST = struct.Struct("<IHHIIQQ")
REPLY = struct.Struct("<IHHIIQQ")
DESC = struct.Struct("<QQQQ")
REGION = struct.Struct("<QQQQQQiIQ")
HELLO_MAGIC = int.from_bytes(b"LDDHIXL\0", "little")
REQUEST_MAGIC = int.from_bytes(b"HXRQ", "little")
REPLY_MAGIC = int.from_bytes(b"HXRP", "little")
VERSION = 1
ADMIN, LOCAL, DATA = 1, 2, 3
LIST, MAP, GET, PUT = 1, 2, 3, 4
