"""Both packages log through one logger, as they are one set of classes."""
import llm_datadist.utils.log
import llm_datadist_v1.utils.log


def test_both_packages_share_the_logger():
    logger = llm_datadist_v1.utils.log.get_logger()
    assert logger is llm_datadist.utils.log.get_logger()
    assert logger.name == "LLM_DATADIST"
