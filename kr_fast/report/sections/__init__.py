"""Sections of the pages: each module yields the blocks of one part of the audit."""
