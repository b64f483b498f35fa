"""Models as users name them: where they are, and the files and the class that they consist of."""
