"""Whole clusters as real processes on real sockets, seen from outside: HTTP, exit codes and logs."""
