//! The source's licence holds for what is made from it.

use crate::{
    card::SourceCard,
    error::{HubError, Result},
    report::Report,
};

/// Requires that the licence of a gated source was accepted by its name.
///
/// A source counts as gated when the Hub said so as it was fetched, or when its card asks something of those who want
/// its files.
///
/// # Errors
/// When it was not.
pub fn check_licence(report: &Report, source: &SourceCard, accepted: &[String]) -> Result<()> {
    let fetched = report.model.source.as_ref();
    let gated = fetched.and_then(|fetched| fetched.gated).unwrap_or(false) || source.is_gated();
    let model = fetched.map_or(&report.model.name, |fetched| &fetched.repository);
    let licence = source.licence().unwrap_or(model);
    if !gated || accepted.iter().any(|name| name.eq_ignore_ascii_case(licence)) {
        return Ok(());
    }
    Err(HubError::Licence { model: model.clone(), licence: licence.to_owned() }.into())
}
