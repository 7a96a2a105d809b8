"""Buses and stores: how messages come in, how records go out, how a message is settled. One bus per file."""
