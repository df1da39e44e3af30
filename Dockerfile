# The image of every part: one static binary, built on the host (make images), and nothing else.
FROM scratch
COPY thaw /thaw
ENTRYPOINT ["/thaw"]
