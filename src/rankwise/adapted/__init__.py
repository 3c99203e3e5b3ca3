"""A model that carries adapters: its slots, the modules it trains whole, and merging."""
