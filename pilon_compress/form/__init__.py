"""What PILON is: primitives in shared banks, composed by every layer of a band."""
