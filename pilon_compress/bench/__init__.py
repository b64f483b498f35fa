"""Times blocks and whole models against dense and quantised ones."""
