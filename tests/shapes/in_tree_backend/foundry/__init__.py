from foundry.cast import metal as metal
