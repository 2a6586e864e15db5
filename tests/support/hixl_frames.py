"""The frames of the transfer protocol as ``hixl/shared/wire.h`` lays them out, for tests that write them by hand."""
import socket
import struct

HELLO = struct.Struct("<QHHI16s16s16s")
WELCOME = struct.Struct("<QHHI16s16s48sQQ")
REQUEST = struct.Struct("<IHHIIQQ")
REPLY = struct.Struct("<IHHIIQQ")
DESC = struct.Struct("<QQQQ")
PART = struct.Struct("<QQQII")
REGION = struct.Struct("<QQQQQQiIQ")
HELLO_MAGIC = int.from_bytes(b"LDDHIXL\0", "little")
REQUEST_MAGIC = int.from_bytes(b"HXRQ", "little")
REPLY_MAGIC = int.from_bytes(b"HXRP", "little")
VERSION = 1
ADMIN, LOCAL, DATA = 1, 2, 3
LIST, MAP, GET, PUT, FETCH, CONFIRM = 1, 2, 3, 4, 5, 6


class Wire:
    """One raw connection."""

    def __init__(self, port):
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=10)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.sock.close()

    def send(self, data):
        self.sock.sendall(data)

    def receive(self, size):
        data = b""
        while len(data) < size:
            part = self.sock.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def hello(self, kind, client_id, nonce=bytes(16), version=VERSION, token=bytes(16)):
        self.send(HELLO.pack(HELLO_MAGIC, version, kind, 0, client_id, token, nonce))
        return WELCOME.unpack(self.receive(WELCOME.size))

    def request(self, op, descs=(), size=0, count=None, argument=0, sequence=7, data=b""):
        count = len(descs) if count is None else count
        self.send(REQUEST.pack(REQUEST_MAGIC, op, 0, sequence, count, size, argument)
                  + b"".join(DESC.pack(*desc) for desc in descs) + data)

    def reply(self):
        """Return (status, text, bytes, argument)."""
        magic, _, text_size, sequence, status, size, argument = REPLY.unpack(self.receive(REPLY.size))
        assert (magic, sequence) == (REPLY_MAGIC, 7)
        return status, self.receive(text_size).decode(), size, argument

    def closed(self):
        """Whether the server closes the connection, within the socket's timeout."""
        try:
            while self.sock.recv(65536):
                pass
        except ConnectionError:
            pass
        return True
