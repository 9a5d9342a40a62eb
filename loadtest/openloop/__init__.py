"""Load at a constant rate whose clock never waits for answers, at a few microseconds of CPU a request. Used by `fraudgate bench`."""
