"""A function without a server of its own: thaw deploy adds one. See docs/functions.md."""

import os

seen = 0  # what is outside of the function is made once for each instance, and lives as long as it


def handle(request):
    global seen
    seen += 1
    if request.method == "POST":
        return {"sum": sum(request.json()["numbers"])}
    return "Hello %s, request %d of this instance\n" % (os.environ.get("TARGET", "World"), seen)
