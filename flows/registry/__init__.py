"""Registry: model versions in MLflow. The only room that imports mlflow."""
