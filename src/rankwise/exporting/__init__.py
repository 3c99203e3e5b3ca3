"""From an adapter to what another engine reads right."""
