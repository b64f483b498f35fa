"""Results: what calls return and commands write, as pydantic models; `dump` gives the keys of the JSON."""
