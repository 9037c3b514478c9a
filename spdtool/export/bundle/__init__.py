"""Exported folders: write, read, lay out for servers, unpack, test."""
