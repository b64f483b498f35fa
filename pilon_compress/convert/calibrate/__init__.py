"""K-FAC statistics of every projection and measured losses of every layer."""
