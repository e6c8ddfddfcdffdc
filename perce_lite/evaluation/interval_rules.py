"""Below how many rows and users there is no interval, or one that is too narrow; read without numpy."""

FEWEST_ROWS, FEWEST_USERS = 5, 2
"""With fewer there is no interval at all."""

FEW_USERS = 6
"""Below it an interval comes out too narrow: simulated on users that differ by chance alone, 4 to 15 % of data sets
without signal were taken for signal, where 2.5 % should be."""
