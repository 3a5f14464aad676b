"""A store on one Redis server: its rows, its scripts, its values; the rows serve Mooncake too."""
