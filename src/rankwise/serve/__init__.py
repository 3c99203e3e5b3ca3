"""Serving: many adapters on one base, answered together. An engine, OpenAI's API and a page over it, and a REPL."""
