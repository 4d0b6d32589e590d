"""The payload of the batch: runs unchanged inside every variant's environment."""

import platform

import numpy
import scipy
import sklearn
from sklearn import datasets
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def evaluate(dataset: str) -> dict:
    """The 5-fold cross-validated accuracy on one of scikit-learn's own data sets, and who computed it."""
    x, y = getattr(datasets, f"load_{dataset}")(return_X_y=True)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return {
        "accuracy": round(float(cross_val_score(model, x, y, cv=5).mean()), 4),
        "scikit_learn": sklearn.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "python": platform.python_version(),
    }
