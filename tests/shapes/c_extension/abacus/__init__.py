from abacus._beads import add as add
