"""How much one client may ask for. Limits of a conversation are in conversation.py.

Sizes are checked before anything is decoded, rates before anything is read.
"""

MiB = 2**20

# A request
BODY = 16 * MiB  # bytes
IMAGE = 8 * MiB  # bytes of one image file
HEAD = 16 * 1024  # bytes of all headers
HEADERS = 100
HEAD_SECONDS = 10  # until the head of a request is there
BODY_SECONDS = 60  # until its body is there
SEND_SECONDS = 60  # until a client reads on, of an answer that it has begun to read
SAMPLES = 8  # of one prompt
DECODED = 64  # images in one request to decode

# All requests
CONNECTIONS = 512
END_SECONDS = 2  # for requests that Ctrl-C cannot cut off
BODIES = 256 * MiB  # bytes of bodies in memory
WAITING = 64  # samples that wait for a slot

# One address: the bucket holds BURST requests and gets RATE a second
RATE, BURST = 500, 1000
TOKEN_RATE, TOKEN_BURST = 1, 5  # wrong tokens
ADDRESSES = 4096  # remembered at once
