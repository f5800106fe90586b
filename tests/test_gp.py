"The estimators pass all of scikit-learn's own checks of an estimator."
from sklearn.utils.estimator_checks import parametrize_with_checks
from synapseclr.analyse.gp_estimators import GPClassifier, GPRegressor

@parametrize_with_checks([GPRegressor(), GPClassifier(), GPClassifier('linear', 'sgpr', n_inducing=20)])
def test_scikit_learn(estimator, check): check(estimator)
